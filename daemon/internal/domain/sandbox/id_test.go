package sandbox

import "testing"

// The ids differ, and each character is as frequent as the others.
func TestNewID(t *testing.T) {
	const n = 20_000
	ids, counts := map[string]bool{}, map[rune]int{}
	for range n {
		id := newID()
		if len(id) != idLength || !IsID(id) || ids[id] {
			t.Fatalf("the id %q has another form, or was used before", id)
		}
		ids[id] = true
		for _, c := range id {
			counts[c]++
		}
	}
	// The standard deviation of a count is about 104. A bias of one byte value, 1/256, is 10 times as much as the tolerance.
	for _, c := range idChars {
		if want := n * idLength / len(idChars); counts[c] < want-700 || counts[c] > want+700 {
			t.Errorf("%c is in the ids %d times, want about %d", c, counts[c], want)
		}
	}
}

func TestIsID(t *testing.T) {
	for id, want := range map[string]bool{
		"abcdefghij0123456789": true, "00000000000000000000": true, "sb-1634ca3220e1ee80": true,
		"": false, "abcdefghij012345678": false, "abcdefghij01234567890": false, "Abcdefghij0123456789": false, "abcdefghij012345678\n": false,
		"abcdefghij0123456789\n": false, "../defghij0123456789": false, "sb-1634ca3220e1ee8": false, "sb-1634ca3220e1ee80a": false,
		"sb-1634CA3220E1EE80": false, "sb-1634ca3220e1ee8g": false,
	} {
		if got := IsID(id); got != want {
			t.Errorf("IsID(%q) = %t, want %t", id, got, want)
		}
	}
}
