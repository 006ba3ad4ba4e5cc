(list (car '()))
