(list (5 6))
