"""The table of the properties that a run has proved, at its end.

It stands here and not beside the properties, because the process that prints it collects no tests when others run them.
"""


def pytest_terminal_summary(terminalreporter):
    rows = []
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, ()):
            if getattr(report, "when", None) == "call":
                rows += [value for name, value in report.user_properties if name == "property"]
    if not rows:
        return
    terminalreporter.section(f"{len(rows)} properties")
    for statement, source, error, tolerance, caught in sorted(rows, key=lambda row: (row[1], row[0])):
        terminalreporter.write_line(f"{statement}  [{source}]")
        mutants = ", ".join(f"{name} ({broken:.1e})" for name, broken in caught)
        terminalreporter.write_line(f"    error {error:.1e} <= {tolerance:.0e}; caught: {mutants}")
