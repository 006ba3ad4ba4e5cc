(define arch "x86_64")
(list (build-machine
  (name "ada")
  (systems `(,(string-append arch "-linux") "i686-linux" ,@(list "i586-gnu")))
  (user "offload")
  (host-key "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP3uQw1AvVfe6sGGzZeQAz0PBvkJqIBufObnF6t8fVAp root@ada")))
