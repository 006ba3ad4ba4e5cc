(define name "outer")
(define port 4444)
(list (build-machine (user name) (name "inner") (systems (list "x86_64-linux")) (private-key name)
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada") (port port)))
