//go:build unix

// The end of serve by a signal, as a process of its own.
package main

import (
	"bufio"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

func TestServeEndsInOrderOnCtrlC(t *testing.T) {
	for _, signal := range []os.Signal{syscall.SIGINT, syscall.SIGTERM} {
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(self, "serve", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--tls", "starttls")
		cmd.Env = append(os.Environ(), "SMTPRELAY_TEST_MAIN=1", "TMPDIR="+t.TempDir())
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		for lines := bufio.NewScanner(out); lines.Scan() && !strings.HasPrefix(lines.Text(), "Page: "); {
		}
		cmd.Process.Signal(signal)
		if err := cmd.Wait(); err != nil {
			t.Errorf("%v: %v", signal, err)
		}
		left, err := os.ReadDir(cmd.Env[len(cmd.Env)-1][len("TMPDIR="):])
		if err != nil || len(left) != 0 {
			t.Errorf("%v: files left: %v, %v", signal, left, err)
		}
	}
}
