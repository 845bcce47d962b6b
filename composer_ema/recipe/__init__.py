"""From a YAML recipe to a trained network: ``schema`` checks, ``build`` builds, ``run`` trains and reports."""
