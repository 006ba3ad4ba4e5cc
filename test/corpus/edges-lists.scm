(list (build-machine
  (name "m0")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")
  (features '("kvm" big))) (build-machine
  (name "m1")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")
  (features '("a b" ""))) (build-machine
  (name "m2")
  (systems '("x86_64-linux" foo 1))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")) (build-machine
  (name "m3")
  (systems '("linux" "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")))
