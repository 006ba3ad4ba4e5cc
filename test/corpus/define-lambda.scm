(define machine
  (lambda (name key)
    (build-machine (name name) (user "u") (systems (list "x86_64-linux")) (host-key key))))
(map machine '("ada" "bea") (list "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada" "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILbhVXoe05ANe+jii7XxN9kYEvMeWakM7drAJ2vFMtGO root@bea"))
