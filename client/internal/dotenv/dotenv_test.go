package dotenv

import (
	"bytes"
	"strings"
	"testing"
)

func TestLookup(t *testing.T) {
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
		if got, err := Lookup(text, "A"); err != nil || got != want {
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
		_, err := Lookup(text, "A")
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

// Lookup accepts any text without a panic, and it returns a value that was written in quotes unchanged.
func FuzzLookup(f *testing.F) {
	for _, text := range []string{"", "A=b", "export A='b\nc'", "A=\"\\", "\ufeff#\r\n", "B='x\nA"} {
		f.Add(text, "msb_v2.public.x")
		f.Add("A=b # c", text)
	}
	double := strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`, "\r", `\r`)
	single := strings.NewReplacer(`\`, `\\`, `'`, `\'`, "\r", "")
	f.Fuzz(func(t *testing.T, text, value string) {
		got, err := Lookup(text, "A")
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
			if got, err := Lookup(line, "A"); err != nil || got != value {
				t.Errorf("%q gives %q, %v", line, got, err)
			}
		}
		value = strings.ReplaceAll(value, "\r", "")
		if got, err := Lookup("A='"+single.Replace(value)+"'", "A"); err != nil || got != value {
			t.Errorf("%q in single quotes gives %q, %v", value, got, err)
		}
	})
}

func TestSet(t *testing.T) {
	for name, tt := range map[string]struct{ before, after string }{
		"empty":                 {"", "K=v\n"},
		"added":                 {"A=1\n", "A=1\nK=v\n"},
		"added without newline": {"A=1", "A=1\nK=v\n"},
		"added with CRLF":       {"A=1\r\nB=2", "A=1\r\nB=2\r\nK=v\r\n"},
		"replaced":              {"A=1\nK=old\nB=2\n", "A=1\nK=v\nB=2\n"},
		"no newline":            {"A=1\nK=old", "A=1\nK=v"},
		"CRLF":                  {"A=1\r\nK=old\r\nB=2\r\n", "A=1\r\nK=v\r\nB=2\r\n"},
		"mixed endings":         {"A=1\nK=old\r\nB=2\n", "A=1\nK=v\r\nB=2\n"},
		"export":                {"export K=\"old\"\n", "export K=v\n"},
		"indented, with spaces": {"\t export  K = 'old' # why\n", "\t export  K=v\n"},
		"every one":             {"K=a\nA=1\nexport K=b\nK=\n", "K=v\nA=1\nexport K=v\nK=v\n"},
		"comments":              {"# K=old\n#K=old\n", "# K=old\n#K=old\nK=v\n"},
		"other names":           {"K_FILE=a\nXK=b\nK2=c\nk=d\nexportK=e\n", "K_FILE=a\nXK=b\nK2=c\nk=d\nexportK=e\nK=v\n"},
		"not text":              {"\x00\xff\n\n\r\nA", "\x00\xff\n\n\r\nA\nK=v\n"},
		"empty lines":           {"\n\n", "\n\nK=v\n"},
		"no assignment":         {"K\nexport K\n", "K\nexport K\nK=v\n"},
	} {
		got := Set([]byte(tt.before), "K", "v")
		if string(got) != tt.after {
			t.Errorf("%s: %q became %q, want %q", name, tt.before, got, tt.after)
		}
		if again := Set(got, "K", "v"); !bytes.Equal(again, got) {
			t.Errorf("%s: set again, it became %q", name, again)
		}
	}
}

// Set changes no line but those that set the variable, and changes nothing if the variable already has the value.
func FuzzSet(f *testing.F) {
	for _, seed := range []string{"", "K=a", "A=1\r\nexport K=b\r\n", "K=\n\nK = x", "\r\r\nK=", "# K=\n"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, before []byte) {
		after := Set(before, "K", "v")
		old, now := bytes.Split(before, []byte("\n")), bytes.Split(after, []byte("\n"))
		set := false
		for i, line := range now {
			if bytes.HasSuffix(bytes.TrimRight(line, "\r"), []byte("K=v")) {
				set = true
			} else if i < len(old) && !bytes.Equal(line, old[i]) && !(i == len(old)-1 && bytes.Equal(line, append(bytes.Clone(old[i]), '\r'))) {
				t.Fatalf("%q became %q: line %d was changed", before, after, i)
			}
		}
		if !set || !bytes.Equal(Set(after, "K", "v"), after) {
			t.Fatalf("%q became %q", before, after)
		}
	})
}
