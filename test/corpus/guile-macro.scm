(define-syntax-rule (machine n k)
  (build-machine (name n) (host-key k) (user "u") (systems (list "x86_64-linux"))))
(list (machine "ada" "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada"))
