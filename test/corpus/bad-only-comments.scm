;; (list)
#|(list)|#
