(use-modules (srfi srfi-26))
(define (machine name port)
  (build-machine (name name) (user "u") (systems (list "x86_64-linux")) (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada") (port port)))
(map (cut machine "ada" <>) '(22 2222))
