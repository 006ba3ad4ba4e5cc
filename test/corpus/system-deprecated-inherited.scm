(define ada (build-machine (name "ada") (system "x86_64-linux") (user "u") (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")))
(list ada
  (build-machine (inherit ada) (system "i686-linux"))
    (build-machine (inherit ada) (systems '("armhf-linux"))))
