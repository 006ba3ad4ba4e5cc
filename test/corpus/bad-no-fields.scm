(list
  (build-machine))
