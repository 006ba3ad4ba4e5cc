(list '(a . b c))
