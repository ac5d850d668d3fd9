package client

import (
	"strings"
	"testing"
)

func TestLookupDotenv(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"A=b":                            "b",
		"A=b\n":                          "b",
		"A=b\r\n":                        "b",
		"A=b\rB=c":                       "b",
		"\ufeffA=b":                      "b",
		"  A = b  ":                      "b",
		"\tA\t=\tb\t":                    "b",
		"export A=b":                     "b",
		"export\t A=b":                   "b",
		"export=1\nA=b":                  "b",
		"A=":                             "",
		"A=\nB=c":                        "",
		"A=b c":                          "b c",
		"A=b=c":                          "b=c",
		"A=b#c":                          "b#c",
		"A=b #c":                         "b",
		"A=b\t# c":                       "b",
		"A= # c":                         "",
		"#A=b":                           "",
		" # A=b\n\n\nA=c":                "c",
		"A=b\nA=c":                       "c",
		"A=b\nA=":                        "",
		"a=b":                            "",
		"AA=b\nXA=c\nA.B=d\nA-B=e":       "",
		"B=A=c":                          "",
		`A="b"`:                          "b",
		`A='b'`:                          "b",
		`A="b" # c`:                      "b",
		`A="b"# c`:                       "b",
		`A="b # c"`:                      "b # c",
		`A='b "c"'`:                      `b "c"`,
		`A="b 'c'"`:                      "b 'c'",
		`A=" b "`:                        " b ",
		`A=""`:                           "",
		`A=b"c"`:                         `b"c"`,
		`A="b\nc\td\r\"\\\'"`:            "b\nc\td\r\"\\'",
		`A='b\nc'`:                       `b\nc`,
		`A='b\'c\\'`:                     `b'c\`,
		`A="b\$C\d"`:                     `b$C\d`,
		`A="$B ${B}"`:                    "$B ${B}",
		"A=$B":                           "$B",
		"A=\"b\nc\"\nB=d":                "b\nc",
		"A='b\r\nc'":                     "b\nc",
		"B=\"x\nA=b\n\"\nA=c":            "c",
		"B='x\nA=b":                      "b",
		"B=\"x\" y\nA=b":                 "b",
		"nonsense\n=x\n: y\nA=b":         "b",
		"B='-----BEGIN\nA=b\n-----END'":  "",
		"A='b'\n\n\n":                    "b",
		"\x00\xff\nA=\xff":               "\xff",
		"if [ -f x ]; then\n  A=b\nfi\n": "b",
	} {
		if got, err := lookupDotenv(text, "A"); err != nil || got != want {
			t.Errorf("%q gives %q, %v; want %q", text, got, err, want)
		}
	}
	for text, want := range map[string]string{
		"A":                       "line 1: there is no =",
		"B=c\n\nA: hunter2":       "line 3: there is no =",
		"export A hunter2":        "line 1: there is no =",
		"B='x\ny'\nA=\"hunter2":   "line 3: the closing quote",
		"A='hunter2\nB=c":         "line 1: the closing quote",
		`A="hunter2\"`:            "line 1: the closing quote",
		"A='x' hunter2":           "line 1: there is text after",
		"#\r\n\r\nA='x'=hunter2#": "line 3: there is text after",
	} {
		_, err := lookupDotenv(text, "A")
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

// lookupDotenv accepts any text without a panic, and it returns a value that was written in quotes unchanged.
func FuzzDotenv(f *testing.F) {
	for _, text := range []string{"", "A=b", "export A='b\nc'", "A=\"\\", "\ufeff#\r\n", "B='x\nA"} {
		f.Add(text, "msb_v2.public.x")
		f.Add("A=b # c", text)
	}
	double := strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`, "\r", `\r`)
	single := strings.NewReplacer(`\`, `\\`, `'`, `\'`, "\r", "")
	f.Fuzz(func(t *testing.T, text, value string) {
		got, err := lookupDotenv(text, "A")
		if err != nil && got != "" {
			t.Errorf("%q gives both %q and %v", text, got, err)
		}
		if strings.Contains(got, "\r") && !strings.Contains(text, `\r`) {
			t.Errorf("%q gives %q", text, got)
		}
		for _, line := range []string{
			`A="` + double.Replace(value) + `"`,
			"#" + strings.NewReplacer("\r", "", "\n", "").Replace(text) + "\r\n export A = \"" + double.Replace(value) + "\" # A=c\r\nB=d",
		} {
			if got, err := lookupDotenv(line, "A"); err != nil || got != value {
				t.Errorf("%q gives %q, %v", line, got, err)
			}
		}
		value = strings.ReplaceAll(value, "\r", "")
		if got, err := lookupDotenv("A='"+single.Replace(value)+"'", "A"); err != nil || got != value {
			t.Errorf("%q in single quotes gives %q, %v", value, got, err)
		}
	})
}
