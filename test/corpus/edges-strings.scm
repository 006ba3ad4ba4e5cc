(list (build-machine
  (name "root@w1")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")) (build-machine
  (name "[::1]")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")) (build-machine
  (name "m2")
  (systems (list "x86_64-linux"))
  (user "a b")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")) (build-machine
  (name "m3")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")
  (compression "none,zlib")) (build-machine
  (name "m4")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")
  (compression "no")) (build-machine
  (name "m5")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")
  (daemon-socket "unix:///a")) (build-machine
  (name "m6")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")
  (daemon-socket "file:///a")) (build-machine
  (name "m7")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "  ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp\n")) (build-machine
  (name "m8")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")
  (compression 'zlib)))
