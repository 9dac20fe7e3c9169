"""Tables, contact sheets and plots that a person looks at: values of `ir` in, text and pictures out.

summary         tables
measured        benchmarks, and two plans side by side
trace           what tracing found
models          the named models
timeline        a plan row by row
plots           error graph, schedules, quality by budget
contact_sheet   clips as rows of frames
pictures        the pictures of a bundle's `reports/` folder
"""

CONTACT_SHEET, SCHEDULES, FRONT = "contact_sheet.png", "schedules.png", "pareto.png"
"""Pictures in the `reports/` folder of a bundle."""

PICTURES = {CONTACT_SHEET: "uncached beside plan", SCHEDULES: "plans on the error graph"}
"""Those of every verified bundle, and what they show."""
