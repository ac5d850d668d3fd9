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

// LoadModules loads the kernel modules in moduleList, in that order. It returns an error only if it cannot read the
// list. If a module cannot be loaded, LoadModules only logs the error, because the machine may work without the module.
// For example, a machine without a network needs no network driver.
func LoadModules(log *slog.Logger) error {
	list, err := os.ReadFile(moduleList)
	if err != nil {
		return err
	}
	for path := range strings.FieldsSeq(string(list)) {
		if err := loadModule(path); err != nil {
			log.Warn("could not load a kernel module", "path", path, "err", err)
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
