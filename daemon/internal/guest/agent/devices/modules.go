package devices

import (
	"errors"
	"log/slog"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// moduleList is a file in the guest image with the paths of the kernel modules to load, one per line.
const moduleList = "/lib/modules/load"

// LoadModules loads the kernel modules in moduleList, in that order. It returns an error only if it cannot read the list.
// A module that cannot be loaded is logged, because the machine may work without it: for example, without a network it
// needs no network driver.
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
