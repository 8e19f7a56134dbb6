"""What analyze.py shows of trained networks. A training imports this for its picture only.

    loading          networks, data and logs that the command line names
    quantities       what is measured: tensors in, numbers out
    accuracy         how often a network is right on its test set, and how well it knows that
    calibration      a temperature for the probabilities, and how well they fit then
    priors           accuracy and logits for other class frequencies
    predict          classes of a user's own pictures; files for other programs
    tensorboard      a run's log for TensorBoard
    tables           rows as text, CSV and markdown; writing files

    figures          the figures by their command; these modules import matplotlib:
    student_figures  where the tokens look, how far, what they span, what they train on
    teacher_figures  how sure a teacher is, how flat its minimum
    run_figures      from logs and results: curves, diversity, imbalance, accuracies, summary
    drawing          what the figures share
    report           one HTML page of all that applies
"""
