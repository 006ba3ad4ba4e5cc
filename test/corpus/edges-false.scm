(list (build-machine
  (name "m0")
  (systems (list "x86_64-linux"))
  (user #f)
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")) (build-machine
  (name "m1")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")
  (compression #f)) (build-machine
  (name "m2")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")
  (compression-level #f)) (build-machine
  (name "m3")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")
  (features #f)) (build-machine
  (name "m4")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")
  (overload-threshold #f)) (build-machine
  (name "m5")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")
  (speed #f)) (build-machine
  (name "m6")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")
  (port #f)) (build-machine
  (name "m7")
  (systems (list "x86_64-linux"))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")
  (daemon-socket #f)))
