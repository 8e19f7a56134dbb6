"""What every run needs, and nothing of the method. Each module imports only those above it:

    runtime       device and processes, seeds, signals, how a script ends
    settings      one table of settings per script: flags, recipes, ranges, names of runs
    checkpoints   files that are written atomically and read without running code from them
    records       the text files of a run, config.json, result.json and log.jsonl
    training      learning rate, averaged weights, optimizer steps that are undone when not finite
    groups        which classes are head, mid and tail
    datasets      loads a data set that the flags name; folders and lists of images
    networks      networks from settings and from files; a teacher's classes in the data's order
    evaluation    what networks predict, and the accuracies of that
    lock          one process at a time in a run's folder
    early_warnings  what a run says while there is still time to stop it
    past_run      what a run's folder holds before training: over, resumed, or refused
    run_folder    a run on disk: log, checkpoint, result
    minutes       --minutes: how many epochs there is time for
"""
