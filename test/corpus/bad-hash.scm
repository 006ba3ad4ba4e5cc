(list #_)
