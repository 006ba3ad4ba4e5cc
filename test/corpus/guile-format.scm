(map (lambda (i) (build-machine (name (format #f "node~a" i)) (user "u") (systems (list "x86_64-linux")) (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")))
     (iota 3 1))
