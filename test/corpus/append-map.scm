(use-modules (srfi srfi-1))
(append-map (lambda (port) (list (build-machine (name "ada") (user "u") (systems '("x86_64-linux")) (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada") (port port))
                                 (build-machine (name "bea") (user "u") (systems '("x86_64-linux")) (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILbhVXoe05ANe+jii7XxN9kYEvMeWakM7drAJ2vFMtGO root@bea") (port port))))
  '(22 2222))
