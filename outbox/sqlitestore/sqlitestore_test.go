// Here belongs what a folder is to be seen doing: the tests of every store, fsyncs, bodies beside the database.
package sqlitestore

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/smtprelay/smtprelay/outbox"
	"github.com/smtprelay/smtprelay/outbox/storetest"
)

func TestStore(t *testing.T) {
	storetest.Run(t, storetest.One, func(t *testing.T, dir string) outbox.Store {
		s, err := Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		return s
	})
}

func TestOpenExistingOpensWhatIsThereAndCreatesNothing(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "outbox")
	if _, err := OpenExisting(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a store: %v, want ErrNotExist", err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the folder: %v, want none", err)
	}
	for _, open := range []func(string) (*Store, error){Open, OpenExisting} {
		s, err := open(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		if _, err := s.Count(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

func TestDatabaseOfAnotherLayoutIsRefused(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.write.Exec(`PRAGMA user_version = 1`); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if s, err := Open(dir); err == nil || !strings.Contains(err.Error(), "layout 1") {
		t.Errorf("%v, %v, want an error that tells the layout", s, err)
	}
}
