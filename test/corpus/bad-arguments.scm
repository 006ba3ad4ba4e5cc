(define (machine name) (list name))
(list (machine))
