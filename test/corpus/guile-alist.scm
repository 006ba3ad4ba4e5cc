(define keys '(("ada" . "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada") ("bea" . "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILbhVXoe05ANe+jii7XxN9kYEvMeWakM7drAJ2vFMtGO root@bea")))
(map (lambda (name) (build-machine (name name) (user "u") (systems (list "x86_64-linux")) (host-key (assoc-ref keys name)))) '("ada" "bea"))
