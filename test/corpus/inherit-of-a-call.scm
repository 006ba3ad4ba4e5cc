(define (machine name)
  (build-machine (name name) (user "u") (systems '("x86_64-linux")) (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")))
(list (build-machine (inherit (machine "ada")) (port 23))
      (build-machine (inherit (car (list (machine "bea")))) (features '("kvm"))))
