(let ((key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada") (systems '("x86_64-linux")))
  (list (build-machine (name "ada") (user "u") (systems systems) (host-key key))))
