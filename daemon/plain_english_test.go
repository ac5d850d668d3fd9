package daemon

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// A plainEnglishExample is a line, and the words in it that a rule of setup/plain-english.sh must find.
type plainEnglishExample struct{ line, found string }

// plainEnglishExamples contains an example for each rule, in the order of the rules.
var plainEnglishExamples = []plainEnglishExample{
	{"The server starts anew.", "anew"},
	{"the address whence it came", "whence"},
	{"the list wherein it is", "wherein"},
	{"the key and the scopes thereof", "thereof"},
	{"It is hereby revoked.", "hereby"},
	{"as hitherto", "hitherto"},
	{"It is refused henceforth.", "henceforth"},
	{"It ends forthwith.", "forthwith"},
	{"lest it be read", "lest"},
	{"whilst it runs", "whilst"},
	{"amongst them", "amongst"},
	{"It is for nought.", "nought"},
	{"It waits for ever.", "for ever"},
	{"The doctor says what is amiss.", "amiss"},
	{"a command that mends it", "mends"},
	{"the user whom it serves", "whom"},
	{"Whoever has a key may call it.", "Whoever"},
	{"a server of his own", "of his own"},
	{"It looks after keys.", "looks after"},
	{"The key is good for a day.", "is good for"},
	{"The key is good again.", "is good again"},
	{"It goes on as before.", "goes on as"},
	{"The session goes on without it.", "goes on without"},
	{"They go on running.", "go on running"},
	{"The sandboxes run on, and are adopted.", "sandboxes run on"},
	{"It cannot be had.", "cannot be had"},
	{"It cannot be told.", "It cannot be told"},
	{"The client is told.", "is told"},
	{"If a key got out, revoke it.", "a key got out"},
	{"Flags go over the environment.", "go over the environment"},
	{"passes says of an error that it is temporary.", "says of "},
	{"It says whether a key is valid.", "says whether"},
	{"an error of a kind of its own", "of a kind of"},
	{"It keeps nobody from it.", "keeps nobody"},
	{"It is used by nobody.", "by nobody"},
	{"Nobody else has it.", "Nobody else"},
	{"The proxy is believed.", "is believed"},
	{"see to its disk", "see to its"},
	{"No error comes of it.", "comes of it"},
	{"It takes no offence.", "takes no offence"},
	{"The store vouches for it.", "vouches for"},
	{"The client is turned away.", "turned away"},
	{"a hiccup of the network", "hiccup"},
	{"Keys become worthless.", "worthless"},
	{"an unforeseen error", "unforeseen"},
	{"The log is not whole.", "not whole"},
	{"It is not wholly gone.", "wholly"},
	{"It makes a key.", "makes a key"},
	{"the keys made before", "keys made before"},
	{"a key with an end of its own", "an end of its own"},
	{"A batch is counted, too.", ", too"},
	{`fmt.Errorf("failed to start: %w", err)`, `Errorf("failed to`},
	{"in order to start it", "in order to"},
	{"It utilizes the cache.", "utilizes"},
	{"prior to the start", "prior to"},
	{"subsequent to the start", "subsequent to"},
	{"in spite of the error", "in spite of"},
	{"due to the fact that it runs", "due to the fact that"},
	{"in the event of an error", "in the event of"},
	{"with regard to keys", "with regard to"},
	{"the aforementioned key", "aforementioned"},
	{"It commences.", "commences"},
	{"It endeavours to stop.", "endeavours"},
	{"The run was cancelled.", "cancelled"},
	{"the colour of a row", "colour"},
	{"It fulfils the contract.", "fulfils"},
	{"It serialises the starts.", "serialises"},
}

// TestPlainEnglish tests that setup/plain-english.sh finds every kind of place, and nothing else.
func TestPlainEnglish(t *testing.T) {
	script, err := filepath.Abs("setup/plain-english.sh")
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(script)
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "<<'RULES'\n")
	list, _, _ := strings.Cut(rest, "\nRULES\n")
	var replacements []string
	for line := range strings.Lines(list) {
		if _, replacement, ok := strings.Cut(strings.TrimSpace(line), " => "); ok {
			replacements = append(replacements, replacement)
		}
	}
	if len(replacements) != len(plainEnglishExamples) {
		t.Fatalf("got %d rules and %d examples", len(replacements), len(plainEnglishExamples))
	}

	var lines, want []string
	for i, example := range plainEnglishExamples {
		lines = append(lines, example.line)
		want = append(want, "a.md:"+strconv.Itoa(i+1)+":"+example.found+": write "+replacements[i])
	}
	checkPlainEnglish(t, script, map[string]string{"a.md": strings.Join(lines, "\n") + "\n"}, want...)

	files := map[string]string{
		"a.md": "\n| Name | |\n|---|---|\n| a | b |\n",
		"b.md": "| | Name |\n| --- | :-: |\n| a | b |\n",
		"c.md": "| A | B |\n|---|---|\n| a | |",
	}
	want = []string{
		"a.md:2:table column without a heading: write a heading",
		"b.md:1:table column without a heading: write a heading",
		"c.md:3:table row with only one cell: fill the other cells",
	}
	names := []string{".ci/run", "Makefile", "d.md", "d/e.go", "f_test.go", "g.py", "h.ts", "i.sh", "j.proto"}
	for _, name := range names {
		files[name] = "x\ny anew z\n"
		want = append(want, name+":2:anew: write "+replacements[0])
	}
	slices.Sort(want)
	checkPlainEnglish(t, script, files, want...)

	checkPlainEnglish(t, script, map[string]string{
		"a.md": `
It is a whole number of the whole file, and the package as a whole.
Two of them cannot be told apart. That is too much, too late.
The hypervisor that sandboxes run on, with its accelerator. It makes a key valid.
A client sends notifications/cancelled. The program raises asyncio.CancelledError.
The message is "whom, too". <!-- plain-english: quoted -->

| Name | Meaning |
|---|---|
| a | b |
`,
		"b.pb.go": "// anew\n",
		"c.txt":   "anew\n",
	})
}

// checkPlainEnglish runs the script in a repository with these files, and compares the lines of its output.
func checkPlainEnglish(t *testing.T, script string, files map[string]string, want ...string) {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	git := exec.Command("sh", "-c", "git init -q && git add .")
	git.Dir = dir
	if out, err := git.CombinedOutput(); err != nil {
		t.Fatalf("create a repository: %v\n%s", err, out)
	}
	cmd := exec.Command(script)
	cmd.Dir = dir
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	_ = cmd.Run()
	wantCode := 0
	if len(want) > 0 {
		wantCode = 1
	}
	if code := cmd.ProcessState.ExitCode(); code != wantCode {
		t.Errorf("got exit code %d, want %d: %s", code, wantCode, &stderr)
	}
	if got := strings.TrimSuffix(stdout.String(), "\n"); got != strings.Join(want, "\n") {
		t.Errorf("got\n%s\nwant\n%s", got, strings.Join(want, "\n"))
	}
}
