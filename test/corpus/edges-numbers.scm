(list (build-machine
  (name "m0")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")
  (overload-threshold 1.8)) (build-machine
  (name "m1")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")
  (overload-threshold 1)) (build-machine
  (name "m2")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")
  (overload-threshold -1)) (build-machine
  (name "m3")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")
  (parallel-builds 0)) (build-machine
  (name "m4")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")
  (parallel-builds 2.0)) (build-machine
  (name "m5")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")
  (parallel-builds 20000)) (build-machine
  (name "m6")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")
  (speed 0)) (build-machine
  (name "m7")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")
  (speed -1)) (build-machine
  (name "m8")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")
  (compression-level 9)))
