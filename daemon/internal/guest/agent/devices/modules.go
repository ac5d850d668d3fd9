package devices

import (
	"errors"
	"log/slog"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// moduleList names the kernel modules that every guest loads, one path on each line.
const moduleList = "/lib/modules/load"

// LoadModules loads the kernel modules that the image lists, in its order. Only the list itself must be
// there: a machine without a network works without its driver.
func LoadModules(log *slog.Logger) error {
	list, err := os.ReadFile(moduleList)
	if err != nil {
		return err
	}
	for path := range strings.FieldsSeq(string(list)) {
		if err := loadModule(path); err != nil {
			log.Warn("load module", "path", path, "err", err)
		}
	}
	return nil
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}
