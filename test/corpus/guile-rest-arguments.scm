(define (machine name . rest)
  (build-machine (name name) (user "u") (systems (if (null? rest) (list "x86_64-linux") rest)) (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")))
(list (machine "ada") (machine "bea" "i686-linux" "x86_64-linux"))
