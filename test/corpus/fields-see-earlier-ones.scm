(list (build-machine
  (name "ada")
  (user (string-append name "-offload"))
  (private-key (string-append "/home/" user "/.ssh/" name))
  (systems (list "x86_64-linux"))
  (port 2222)
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")))
