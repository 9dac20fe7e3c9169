"""Tables, pictures and the page that a person looks at: values of `ir` in, text and pictures out.

summary         tables
measured        benchmarks, and two plans side by side
trace           what tracing found
models          the named models
timeline        a plan row by row
plots           error graph, schedules, quality by budget
ways            a plan beside what else its full steps can be spent on
page            a bundle as one HTML page
charts          the drawings on it
contact_sheet   a clip made in several ways, and what they differ by
pictures        the pictures of a bundle's `reports/` folder
"""

CONTACT_SHEET, SCHEDULES, FRONT = "contact_sheet.png", "schedules.png", "pareto.png"
"""Pictures in the `reports/` folder of a bundle."""

PAGE = "report.html"
"""The page there."""

PICTURES = {
    PAGE: "all of it on one page",
    CONTACT_SHEET: "all steps, the plan, LeMiCa and fewer steps side by side",
    SCHEDULES: "plans on the error graph",
}
"""Those of every verified bundle, and what they show."""
