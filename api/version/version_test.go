package version

import (
	"regexp"
	"testing"
)

func TestString(t *testing.T) {
	defer func(before string) { commit = before }(commit)
	commit = ""
	if got := String(); !regexp.MustCompile(`^` + regexp.QuoteMeta(Number) + `(\+g[0-9a-f]{12}(-dirty)?)?$`).MatchString(got) {
		t.Errorf("without the linker: %q", got)
	}
	commit = "1a2b3c4d5e6f-dirty"
	if got := String(); got != Number+"+g1a2b3c4d5e6f-dirty" {
		t.Errorf("got %q", got)
	}
}
