;;; The machines.scm of long ago.
(define gnu
  (build-machine
   (name "gnu.example.org") ;; "192.0.2.26"
   (user "hydra")
   (system "x86_64-linux")
   (private-key "/home/hydra/.lsh/identity")
   (ssh-options '("-c" "aes256-ctr"))
   (speed 1.7)))
(list gnu)
