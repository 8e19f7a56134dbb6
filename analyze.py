def summary(folder): return "none yet"
