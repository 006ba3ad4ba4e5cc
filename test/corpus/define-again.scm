(define port 1)
(define (machine) (build-machine (name "ada") (user "u") (systems (list "x86_64-linux")) (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada") (private-key (if (null? '()) "/yes" "/no")) (port port)))
(define port 2)
(list (machine))
