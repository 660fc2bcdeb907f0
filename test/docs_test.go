// Here belongs what the documents claim and a test can check.
package test

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// The table of complaints in TESTING.md has 78 of them, each with a reason why it cannot concern this module, or with tests
// and transcripts, which must be there.
func TestComplaintsAreHeldByTestsThatExist(t *testing.T) {
	page, err := os.ReadFile("../TESTING.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, found := strings.Cut(string(page), "\n## Complaints of other clients\n")
	if !found {
		t.Fatal("TESTING.md has no section on the complaints of other clients")
	}
	var code strings.Builder
	err = filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		text, err := os.ReadFile(path)
		code.Write(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	row := regexp.MustCompile(`(?m)^\| (\d+) \|.*\| ([^|]*) \|$`)
	name := regexp.MustCompile("`([^`]+)`")
	number := 0
	for _, m := range row.FindAllStringSubmatch(section, -1) {
		number++
		if m[1] != strconv.Itoa(number) {
			t.Errorf("complaint %d is numbered %s", number, m[1])
		}
		for _, n := range name.FindAllStringSubmatch(m[2], -1) {
			_, err := os.Stat(filepath.Join("../internal/test/dialogue/testdata", n[1]))
			isFunc := strings.Contains(code.String(), "\nfunc "+n[1]+"(")
			if script := strings.HasSuffix(n[1], ".txt"); script && err != nil || !script && !isFunc {
				t.Errorf("complaint %d: there is no %s", number, n[1])
			}
		}
		if strings.TrimSpace(m[2]) == "" {
			t.Errorf("complaint %d is held by nothing", number)
		}
	}
	want(t, "complaints", number, 78)
}
