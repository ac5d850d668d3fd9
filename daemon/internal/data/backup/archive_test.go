package backup_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"github.com/msbd/msbd/api/audit"
)

// An archive can be read with tar, and the audit log in it can be verified without the server.
func TestArchive(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	key := s.issue(t, "a")
	head := s.store.AuditHead()
	archive := s.write(t)
	members := map[string][]byte{}
	var names []string
	for r := tar.NewReader(bytes.NewReader(archive)); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Mode != 0o600 {
			t.Errorf("%s has mode %o, want 600", h.Name, h.Mode)
		}
		names = append(names, h.Name)
		if members[h.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff([]string{"manifest.json", "keyring.json", "msb.db", "audit.jsonl"}, names); diff != "" {
		t.Error(diff)
	}
	if got, err := audit.Verify(bytes.NewReader(members["audit.jsonl"])); err != nil || got != head {
		t.Errorf("the audit log ends with %v, %v, want %v", got, err, head)
	}
	keyring, err := os.ReadFile(filepath.Join(s.dir, "keyring.json"))
	if err != nil || !bytes.Equal(keyring, members["keyring.json"]) {
		t.Errorf("keyring.json differs from the file in the state directory: %v", err)
	}
	if signing := s.issuer.SigningKey(); !bytes.Contains(members["manifest.json"], []byte(signing.ID)) {
		t.Errorf("the manifest does not name the signing key:\n%s", members["manifest.json"])
	}
	if bytes.Contains(archive, []byte(key)) {
		t.Error("the archive contains an API key")
	}
	if diff := cmp.Diff(usualFiles, s.files(t)); diff != "" {
		t.Errorf("files in the state directory: %s", diff)
	}
}

// rewrite applies change to each member of an archive and returns a new archive with the right sizes in its tar headers.
// It does not update the manifest. If change returns no header, the member is removed.
func rewrite(t testing.TB, archive []byte, change func(h *tar.Header, content []byte) (*tar.Header, []byte)) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for r := tar.NewReader(bytes.NewReader(archive)); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if h, content = change(h, content); h == nil {
			continue
		}
		h.Size = int64(len(content))
		if h.Typeflag != tar.TypeReg {
			h.Size = 0
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Size > 0 {
			if _, err := w.Write(content); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// Restore refuses a bad archive with an error that says why, and changes nothing.
func TestBadArchives(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.issue(t, "in-the-backup")
	good := s.write(t)
	if _, err := s.issuer.Reset(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	key := s.issue(t, "present")

	member := func(name string, change func(h *tar.Header, content []byte) (*tar.Header, []byte)) []byte {
		return rewrite(t, good, func(h *tar.Header, content []byte) (*tar.Header, []byte) {
			if h.Name == name {
				return change(h, content)
			}
			return h, content
		})
	}
	replaced := func(name, old, new string) []byte {
		return member(name, func(h *tar.Header, content []byte) (*tar.Header, []byte) {
			if !bytes.Contains(content, []byte(old)) {
				t.Fatalf("%s does not contain %q", name, old)
			}
			return h, bytes.Replace(content, []byte(old), []byte(new), 1)
		})
	}
	renamed := func(name, to string) []byte {
		return member(name, func(h *tar.Header, content []byte) (*tar.Header, []byte) { h.Name = to; return h, content })
	}
	typed := func(name string, typ byte) []byte {
		return member(name, func(h *tar.Header, content []byte) (*tar.Header, []byte) {
			h.Typeflag, h.Linkname = typ, "/etc/passwd"
			return h, content
		})
	}
	without := func(name string) []byte {
		return member(name, func(*tar.Header, []byte) (*tar.Header, []byte) { return nil, nil })
	}
	flipped := func(at int) []byte {
		b := bytes.Clone(good)
		b[at] ^= 1
		return b
	}
	tests := map[string]struct {
		archive []byte
		class   func(error) bool
		message string
	}{
		"empty":                           {nil, errdefs.IsInvalidArgument, "not a backup"},
		"text":                            {[]byte("hello\n"), errdefs.IsInvalidArgument, "not a backup"},
		"other tar":                       {renamed("manifest.json", "README"), errdefs.IsInvalidArgument, "not a backup"},
		"other format":                    {replaced("manifest.json", "msb-backup", "xyz-backup"), errdefs.IsInvalidArgument, "not a backup"},
		"newer":                           {replaced("manifest.json", `"version": 1`, `"version": 2, "new": [{}]`), errdefs.IsFailedPrecondition, "newer msbd"},
		"version 0":                       {replaced("manifest.json", `"version": 1`, `"version": 0`), errdefs.IsDataLoss, "manifest"},
		"unknown in manifest":             {replaced("manifest.json", `"version": 1`, `"version": 1, "new": 1`), errdefs.IsDataLoss, "manifest"},
		"manifest not JSON":               {replaced("manifest.json", `{`, `[`), errdefs.IsDataLoss, "manifest"},
		"huge size":                       {replaced("manifest.json", `"size": `, `"size": 99999999999999`), errdefs.IsDataLoss, "manifest"},
		"negative size":                   {replaced("manifest.json", `"size": `, `"size": -`), errdefs.IsDataLoss, "manifest"},
		"path with ..":                    {renamed("keyring.json", "../keyring.json"), errdefs.IsDataLoss, "keyring.json"},
		"absolute path":                   {renamed("msb.db", "/msb.db"), errdefs.IsDataLoss, "msb.db"},
		"path with .. in manifest":        {replaced("manifest.json", `"msb.db"`, `"../x"`), errdefs.IsDataLoss, "manifest"},
		"symbolic link":                   {typed("msb.db", tar.TypeSymlink), errdefs.IsDataLoss, "msb.db"},
		"hard link":                       {typed("keyring.json", tar.TypeLink), errdefs.IsDataLoss, "keyring.json"},
		"device":                          {typed("audit.jsonl", tar.TypeChar), errdefs.IsDataLoss, "audit.jsonl"},
		"without keyring":                 {without("keyring.json"), errdefs.IsDataLoss, "keyring.json"},
		"without store":                   {without("msb.db"), errdefs.IsDataLoss, "msb.db"},
		"without audit log":               {without("audit.jsonl"), errdefs.IsDataLoss, "audit.jsonl"},
		"keyring changed":                 {replaced("keyring.json", `"seed":"`, `"seed":"A`), errdefs.IsDataLoss, "keyring.json"},
		"store flipped":                   {flipped(8 << 10), errdefs.IsDataLoss, "wrong size or checksum of msb.db"},
		"audit log changed":               {replaced("audit.jsonl", "uid:1000", "uid:1001"), errdefs.IsDataLoss, "audit.jsonl"},
		"truncated":                       {good[:len(good)/2], errdefs.IsDataLoss, "truncated in"},
		"truncated in manifest":           {good[:600], errdefs.IsDataLoss, "manifest"},
		"text appended":                   {append(bytes.Clone(good), "more"...), errdefs.IsDataLoss, "extra data"},
		"too much padding":                {append(bytes.Clone(good), make([]byte, 100<<10)...), errdefs.IsDataLoss, "extra data"},
		"two in one":                      {append(bytes.Clone(good[:len(good)-1024]), good...), errdefs.IsDataLoss, "extra data"},
		"keyring with matching checksums": {forged(t, good, "keyring.json", `"key_id":"`, `"key_id":"0`), errdefs.IsDataLoss, "keyring"},
		"store with matching checksums":   {forged(t, good, "msb.db", "created_at", "cReated_at"), errdefs.IsDataLoss, "store"},
	}
	before := s.actions(t)
	for name, tt := range tests {
		_, err := s.Restore(t.Context(), bytes.NewReader(tt.archive), 0)
		if !tt.class(err) || !strings.Contains(err.Error(), tt.message) {
			t.Errorf("%s: %v, want %q", name, err, tt.message)
		}
		if !s.accepts(key) {
			t.Fatalf("%s: the present key is refused", name)
		}
	}
	fault := errors.New("the connection broke")
	_, err := s.Restore(t.Context(), io.MultiReader(bytes.NewReader(good[:9000]), iotest.ErrReader(fault)), 0)
	if !errors.Is(err, fault) || errdefs.IsDataLoss(err) {
		t.Errorf("Restore from a failing reader: %v, want %v and no data loss", err, fault)
	}
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Restore(canceled, bytes.NewReader(good), 0); !errors.Is(err, context.Canceled) {
		t.Errorf("Restore with a canceled context: %v, want canceled", err)
	}
	if diff := cmp.Diff(before, s.actions(t)); diff != "" {
		t.Errorf("the audit log was changed: %s", diff)
	}
	if diff := cmp.Diff(usualFiles, s.files(t)); diff != "" {
		t.Errorf("files in the state directory: %s", diff)
	}
	if s = s.reopen(t); !s.accepts(key) {
		t.Error("the present key is refused after a restart")
	}
}

// forged replaces old by new in a member and updates the member's size and checksum in the manifest.
func forged(t testing.TB, archive []byte, name, old, new string) []byte {
	t.Helper()
	var oldSum, newSum string
	var size int
	changed := rewrite(t, archive, func(h *tar.Header, content []byte) (*tar.Header, []byte) {
		if h.Name == name {
			oldSum = fmt.Sprintf("%x", sha256.Sum256(content))
			content = bytes.Replace(content, []byte(old), []byte(new), 1)
			newSum, size = fmt.Sprintf("%x", sha256.Sum256(content)), len(content)
		}
		return h, content
	})
	return rewrite(t, changed, func(h *tar.Header, content []byte) (*tar.Header, []byte) {
		if h.Name == "manifest.json" {
			content = bytes.Replace(content, []byte(oldSum), []byte(newSum), 1)
			sizes := regexp.MustCompile(`("name": "` + name + `",\s*"size": )\d+`)
			content = sizes.ReplaceAll(content, fmt.Appendf(nil, "${1}%d", size))
		}
		return h, content
	})
}
