(list (if))
