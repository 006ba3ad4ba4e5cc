(list (quote a)
'