rule tables:
    input:
        [f"{RESULTS}/{model}/{variant.name}/quality.json" for model, variant in VARIANTS],


rule figures:
    input:
        [],
