(define* (machine name #:key (port 22) (speed 1.0))
  (build-machine (name name) (port port) (speed speed) (user "u") (systems (list "x86_64-linux")) (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")))
(list (machine "ada") (machine "bea" #:port 2222) (machine "cyd" #:speed 1/2))
