(list (build-machine (user "u") (features (list "kvm")) (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada") (speed 1)
   (systems '("i586-gnu")) (port 10022) (name "hurd.example")))
