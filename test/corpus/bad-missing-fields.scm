(list (build-machine
  (systems (list "x86_64-linux"))))
