(let* ((host "ada") (domain "example.org") (host (string-append host "." domain)))
  (list (build-machine (name host) (user "u") (systems (list "x86_64-linux")) (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada"))))
