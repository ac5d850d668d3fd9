package keys

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"github.com/msbd/msbd/daemon/internal/sys/bounded"
)

// pages returns the names of all keys that f selects, listed in pages of the given size. It checks that only the last
// page is shorter.
func pages(t testing.TB, i *Issuer, f Filter, size int) (names []string) {
	t.Helper()
	for after := ""; ; {
		keys, next, err := i.List(f, after, size)
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range keys {
			names = append(names, k.Name)
		}
		if next == "" {
			return names
		}
		if len(keys) != size {
			t.Errorf("a page has only %d keys but is not the last one", len(keys))
		}
		after = next
	}
}

func TestList(t *testing.T) {
	t.Parallel()
	_, i, v, clock := newClocked(t)
	used, _ := issue(t, i, IssueRequest{Name: "global"})
	clock.pass(time.Hour)
	issue(t, i, IssueRequest{Name: "a", Namespaces: []string{"a"}, Expire: "1d"})
	issue(t, i, IssueRequest{Name: "ab", Namespaces: []string{"a", "b"}})
	clock.pass(24 * time.Hour)
	issue(t, i, IssueRequest{Name: "b", Namespaces: []string{"b"}})
	revoke(t, i, "ab")
	accepted(t, v, used)
	clock.pass(time.Hour)
	issue(t, i, IssueRequest{Name: "new"})

	for _, tt := range []struct {
		filter Filter
		want   string
	}{
		{Filter{}, "global a ab b new"},
		{Filter{Namespace: "a"}, "global a ab new"},
		{Filter{Namespace: "b"}, "global ab b new"},
		{Filter{Namespace: "c"}, "global new"},
		{Filter{State: Live}, "global b new"},
		{Filter{State: Expired}, "a"},
		{Filter{State: Revoked}, "ab"},
		{Filter{UnusedFor: "1h"}, "global a ab b"},
		{Filter{UnusedFor: "61m"}, "a ab"},
		{Filter{UnusedFor: "1d"}, "a ab"},
		{Filter{UnusedFor: "1mo"}, ""},
		{Filter{UnusedFor: "1d", Namespace: "a", State: Expired}, "a"},
	} {
		for size := range 7 { // 0 means the default
			got := pages(t, i, tt.filter, size)
			// Keys that were created in the same millisecond are ordered by their random ids.
			want := strings.Fields(tt.want)
			order(i, want)
			if !slices.Equal(got, want) {
				t.Errorf("%+v in pages of %d: %q, want %q", tt.filter, size, got, want)
			}
		}
	}
	for _, bad := range []Filter{{Namespace: "*"}, {UnusedFor: "1"}, {State: 4}, {State: -1}} {
		if _, _, err := i.List(bad, "", 1); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	for _, bad := range []string{"x", "-", "1", "x-" + randomID(), "--"} {
		if _, _, err := i.List(Filter{}, bad, 1); !errdefs.IsInvalidArgument(err) {
			t.Errorf("after %q: %v", bad, err)
		}
	}
	if keys, _, err := i.List(Filter{}, "", 1); err != nil || keys[0].Requests != 1 || keys[0].LastUsedFrom != from ||
		!keys[0].LastUsedAt.Equal(clock.now().Add(-time.Hour)) {
		t.Errorf("the usage of the first key: %+v, %v", keys, err)
	}
}

// order sorts names in the order in which List returns their keys.
func order(i *Issuer, names []string) {
	position := func(name string) position { return i.keys.byName[name][0].position() }
	slices.SortFunc(names, func(a, b string) int { return position(a).compare(position(b)) })
}

// A list that is read in pages has every key exactly once, even if keys are created or pruned in the meantime.
func TestPagesAreStable(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	_, i, _, clock := newClocked(t)
	var ids []string
	for n := range 30 {
		_, r := issue(t, i, IssueRequest{Expire: "1h"})
		ids = append(ids, r.ID)
		if n%3 == 0 {
			clock.pass(time.Millisecond)
		}
	}
	first, next, err := i.List(Filter{}, "", 10)
	if err != nil {
		t.Fatal(err)
	}
	clock.pass(2 * time.Hour)
	if dead, err := i.Prune(ctx, "", true, 0); err != nil || len(dead) != 30 {
		t.Fatal(len(dead), err)
	}
	i.keys.remove(first[9].ID, first[3].ID) // includes the key at the end of the first page
	issue(t, i, IssueRequest{})
	rest, end, err := i.List(Filter{}, next, 100)
	if err != nil || end != "" {
		t.Fatal(end, err)
	}
	var got []string
	for _, k := range append(first, rest...) {
		got = append(got, k.ID)
	}
	slices.Sort(ids)
	all := slices.Sorted(slices.Values(got[:30]))
	if len(got) != 31 || !slices.Equal(all, ids) {
		t.Errorf("the pages hold %d keys, want 31 with the first 30 among them", len(got))
	}
	if !slices.IsSortedFunc(append(first, rest...), func(a, b Key) int {
		return (&key{Record: a.Record}).position().compare((&key{Record: b.Record}).position())
	}) {
		t.Error("the keys are not in the order of creation")
	}
}

func TestFind(t *testing.T) {
	t.Parallel()
	_, i, _, clock := newClocked(t)
	at := clock.now()
	dead := at.Add(-time.Hour)
	put := func(id, name string, change func(*Record)) {
		r := Record{ID: id + strings.Repeat("0", idLength-len(id)), Name: name, CreatedAt: at, SigningKeyID: i.SigningKey().ID}
		if change != nil {
			change(&r)
		}
		i.keys.put(r)
	}
	revoked := func(r *Record) { r.RevokedAt = dead }
	put("aaaa1", "ci", nil)
	put("aaaa2", "", nil)
	put("bbbb", "ci", revoked)
	put("cccc", "old", revoked)
	put("dddd1", "older", revoked)
	put("dddd2", "older", func(r *Record) { r.ExpiresAt = dead })
	put("eeee1", "moving", func(r *Record) { r.RevokedAt, r.ReplacedBy = at.Add(time.Hour), "eeee2" })
	put("eeee2", "moving", nil)
	put("ffff", "cccc", nil)
	put("1234", "dead-beef", nil)
	put("beef", "beef", nil)
	full := strings.Repeat("0", idLength-4)
	put("9999", "1234"+full, nil) // its name is the id of another key
	put("abab", "grace", func(r *Record) { r.RevokedAt, r.ReplacedBy = at.Add(time.Hour), "acac" })
	put("acac", "grace", revoked)
	put("5555", "twins", nil)
	put("6666", "twins", nil)
	put("6667", "twins", revoked)

	for ref, want := range map[string]string{
		"aaaa1" + full[1:]: "aaaa1",
		"aaaa1":            "aaaa1",
		"aaaa10":           "aaaa1",
		"bbbb":             "bbbb",
		"ci":               "aaaa1", // the live key
		"old":              "cccc",  // revoked, but the only key with this name
		"moving":           "eeee2", // the key that was not rotated
		"grace":            "abab",  // the only live key, although it was rotated
		"dead-beef":        "1234",
		"beef":             "beef", // the name and the id prefix of the same key
		"1234" + full:      "1234", // an id has precedence over a name
	} {
		if k, err := i.Find(ref); err != nil || !strings.HasPrefix(k.ID, want) {
			t.Errorf("Find(%q): %s, %v, want %s", ref, k.ID, err, want)
		}
	}
	for ref, want := range map[string][]string{
		"aaaa":  {"aaaa1", "aaaa2"},
		"older": {"dddd1", "dddd2"},
		"cccc":  {"cccc", "ffff"}, // the id prefix of one key and the name of another
		"eeee":  {"eeee1", "eeee2"},
		"twins": {"5555", "6666"}, // the two live keys
	} {
		_, err := i.Find(ref)
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "use the complete id") {
			t.Errorf("Find(%q): %v", ref, err)
			continue
		}
		if n := strings.Count(err.Error(), full[1:]); n != len(want) {
			t.Errorf("Find(%q): %v, which names %d keys, want %q", ref, err, n, want)
		}
		for _, id := range want {
			if !strings.Contains(err.Error(), id) {
				t.Errorf("Find(%q): %v, which does not name %s", ref, err, id)
			}
		}
	}
	for _, ref := range []string{"", "aaa", "AAAA1", "aaaa3", "CI", "c", strings.Repeat("x", 1e5)} {
		if k, err := i.Find(ref); !errdefs.IsNotFound(err) || len(err.Error()) > 300 {
			t.Errorf("Find(%q): %s, %v", bounded.Short(ref), k.ID, err)
		}
	}
	for n := range 20 {
		put(fmt.Sprintf("77770%02d", n), "", nil)
	}
	if _, err := i.Find("7777"); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "12 more") {
		t.Errorf("20 keys: %v", err)
	}
}

// After many changes, the indexes are the same as if they were built from the records at once.
func TestIndexAgreesWithRebuiltIndex(t *testing.T) {
	t.Parallel()
	_, i, _, clock := newClocked(t)
	for n := range 200 {
		_, r := issue(t, i, IssueRequest{Name: fmt.Sprint("key-", n), Expire: "1h"})
		switch n % 4 {
		case 0:
			clock.set(clock.now().Add(-time.Millisecond)) // so that keys are not always created in order
		case 1:
			revoke(t, i, r.ID)
		case 2:
			clock.pass(3 * time.Millisecond)
		case 3:
			if n%8 == 3 {
				i.keys.remove(r.ID)
			}
		}
	}
	rebuilt := newKeySet(i.clock, i.keys.identity)
	rebuilt.put(i.keys.records()...)
	summary := func(ks *keySet) map[string]any {
		ids := func(keys []*key) (ids []string) {
			for _, k := range keys {
				ids = append(ids, k.ID)
			}
			return ids
		}
		s := map[string]any{"by age": ids(ks.byAge), "ids": len(ks.byID)}
		for name, keys := range ks.byName {
			s["name "+name] = ids(keys)
		}
		for prefix, keys := range ks.byPrefix {
			s["prefix "+prefix] = slices.Sorted(slices.Values(ids(keys)))
		}
		return s
	}
	if diff := cmp.Diff(summary(rebuilt), summary(i.keys)); diff != "" {
		t.Error(diff)
	}
}
