(define (machine name)
  (build-machine (name name)))
(list (machine "ada"))
