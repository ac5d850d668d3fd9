package main

import (
	"errors"
	"fmt"
	"math"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// timeLimit is the value of a flag that takes a time: a number of seconds, or numbers with units, such as 1d or 1h30m.
type timeLimit time.Duration

var weeksPattern = regexp.MustCompile(`^(?:([0-9]+(?:\.[0-9]+)?)w)?(?:([0-9]+(?:\.[0-9]+)?)d)?(.*)$`)

func (t *timeLimit) Set(text string) error {
	wrong := errors.New("give a number of seconds, or a number with a unit, s, m, h, d or w, such as 90s, 1h30m or 1d")
	total, rest := 0.0, text
	if seconds, err := strconv.ParseFloat(text, 64); err == nil {
		total, rest = seconds, ""
	} else if match := weeksPattern.FindStringSubmatch(text); match != nil && match[3] != text {
		weeks, _ := strconv.ParseFloat("0"+match[1], 64)
		days, _ := strconv.ParseFloat("0"+match[2], 64)
		total, rest = (weeks*7+days)*24*60*60, match[3]
	}
	if rest != "" || text == "" {
		d, err := time.ParseDuration(rest)
		if err != nil {
			return wrong
		}
		total += d.Seconds()
	}
	if !(total >= 0 && total < time.Duration(math.MaxInt64).Seconds()) { // also refuses NaN
		return wrong
	}
	*t = timeLimit(math.Round(total * float64(time.Second)))
	return nil
}

func (t *timeLimit) String() string { return "" }

// sandboxSize is the value of a flag that takes a size of memory or of a disk, in MiB: a number, or a number with a unit, such as
// 1g or 512MB. As with docker, KVM and the server, all units are powers of 1024.
type sandboxSize struct {
	mib   int
	least int // the server checks it as well
}

// minMemory and minDisk are the least sizes of a sandbox, in MiB.
const minMemory, minDisk = 128, 64

var sizePattern = regexp.MustCompile(`^([0-9]+(?:\.[0-9]+)?) ?(m|mb|mib|g|gb|gib|t|tb|tib)?$`)

func (s *sandboxSize) Set(text string) error {
	parts := sizePattern.FindStringSubmatch(strings.ToLower(text))
	if parts == nil {
		return errors.New("give a number of MiB, or a number with a unit, such as 512m, 512MB or 1g")
	}
	n, _ := strconv.ParseFloat(parts[1], 64)
	switch {
	case strings.HasPrefix(parts[2], "g"):
		n *= 1 << 10
	case strings.HasPrefix(parts[2], "t"):
		n *= 1 << 20
	}
	switch {
	case n < float64(s.least):
		return fmt.Errorf("give at least %d MiB", s.least)
	case n != math.Trunc(n) || n > math.MaxInt32:
		return errors.New("give a whole number of MiB")
	}
	s.mib = int(n)
	return nil
}

func (s *sandboxSize) String() string { return "" }
